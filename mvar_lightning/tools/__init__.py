"""The ground: files, processes, compute, console, drawing, plots. What every room stands on, and nothing of its matter."""
