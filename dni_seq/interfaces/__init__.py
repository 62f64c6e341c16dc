"""Interfaces that cut a network in two parts and replace real messages between them with synthetic ones."""
