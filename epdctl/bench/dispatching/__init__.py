"""What the encoder router costs an item, against the least that two hops over sockets can cost."""
