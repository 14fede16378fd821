"""Runs, devices, rounds and receipts in SQL; blobs by content."""
