"""Studies: many simulated runs by design, and what they say with which certainty."""
