"""The ground that every room stands on: files, processes, compute, console, drawing, plots; nothing of their matter."""
