"""Every message between processes, how it is framed, and the sockets it travels on.

Nothing outside this package touches zmq or msgpack. One tagged union per socket and direction; a receiver matches on
the message's class and ends with ``assert_never``.
"""
