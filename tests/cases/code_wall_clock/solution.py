import time

t = time.process_time()
while time.process_time() - t < 1.0:
    pass
print(2)
