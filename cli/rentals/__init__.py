"""Commands about rented computers: their providers, costs and bills, and the network that they are on."""
