"""Where a network is cut, and synthetic messages replace real ones."""
