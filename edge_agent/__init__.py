"""The agent: one device, in a network process and a trainer process."""
