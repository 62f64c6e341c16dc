"""From options to the objects that credit assignment is made of."""
