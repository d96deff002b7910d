"""What `experiments/report.py` is made of: results, what they say, pictures, pages, and the viewer of answers."""
