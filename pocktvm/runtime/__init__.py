"""What runs on the device (`c/`, shipped inside every artifact), and what drives it from Python."""
