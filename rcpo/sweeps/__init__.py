"""Many runs: started beside each other, searched over, and compared."""
