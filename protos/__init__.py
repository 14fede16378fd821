"""The contract on the wire, and what both ends must agree on byte for byte."""
