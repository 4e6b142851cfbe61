"""Trained testbeds: small models that answer questions about drawn images, and what pruning costs them."""
