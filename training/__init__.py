"""A tiny model of our own: the program that writes its data, trains it and scores it. No product code imports this."""
