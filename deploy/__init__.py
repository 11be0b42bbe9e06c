"""What the receiver of an expert runs: chat in the terminal; bundles for laptop, phone and browser."""
