"""What the numbers mean: accuracy, calibration, honest competitors, and the pages that show them."""
