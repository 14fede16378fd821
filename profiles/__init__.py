"""What a device, a link and a model are, and what a local round costs them."""
