"""How fast an encoder is: its tower alone, and whole ranks fed with pictures. ``measure.run`` is what the CLI calls."""
