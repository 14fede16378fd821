"""The dashboard, /metrics and /healthz: read-only, on a listener of their own."""
