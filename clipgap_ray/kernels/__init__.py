"""Arrays in, arrays out: numpy, torch, faiss, scipy and numba only. No Ray, files, settings, logging or clocks."""
