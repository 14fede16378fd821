"""What each page says: facts in, plain values out. No HTTP, no markup but charts."""
