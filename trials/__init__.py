"""Field trials, demos and studies on one machine or many."""
