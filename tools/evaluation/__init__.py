"""What tools.evaluate is made of."""
