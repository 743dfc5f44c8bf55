"""What carries every chapter: a rule for each kind of layer, one walk over them, one solve."""
