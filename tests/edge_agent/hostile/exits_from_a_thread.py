import os
import threading
import time

threading.Thread(target=lambda: os._exit(0)).start()
time.sleep(10)
