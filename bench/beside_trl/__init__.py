"""The two halves of `bench.trl_baseline`, SFT and GRPO, and how ours and trl's trainers take turns."""
