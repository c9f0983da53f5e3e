"""The embedded model ``shapes-vl``: its pictures, its questions, how it was trained and how well it answers."""
