"""What any such program needs and no science: command lines, files, downloads, tokenizers, data,
training runs, the terminal, statistics. Nothing here imports the heart or the tasks.

Commands import from here before they import torch, so that this is read when its threads start:
those that wait for each other sleep. Spinning, they take a busy core from the one they wait for,
and small models then run twenty times slower. And MKL shares a product out evenly, the same way
every time: as it does by itself, two threads take up to 1.4 times as long (docs/speed.md)."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MKL_CBWR", "AUTO")
