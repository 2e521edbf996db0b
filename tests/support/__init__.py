"""What the tests share: tiny models, clips, fake servers and hubs, the parity harness."""
