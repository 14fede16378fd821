import ctypes
import os

evidence(repr(dict(os.environ)))
evidence(repr(ctypes.CDLL(None).getenv(b"MUSEUM") != 0 and os.environb.get(b"MUSEUM")))
raise SystemExit
