"""The life of one rank. ``table`` is the machine; ``starting``, ``serving``, ``asked`` and ``faults`` are its handlers,
made from the steps in ``moves``; ``rank``, ``events`` and ``actions`` are the values that go in and out,
``endings`` the words for how a process ended."""
