"""What arae costs, measured side by side on one machine. Records, never tests: nothing here passes or fails."""
