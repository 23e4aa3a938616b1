"""One-epoch training scripts, as users write them; each prints when its first step was done."""
