"""The trainer process; the only room with torch in it. Imports no gRPC."""
