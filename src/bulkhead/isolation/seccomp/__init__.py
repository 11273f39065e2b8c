"""System call filters: profiles as data, a compiler to BPF, and the way back to words."""
