"""Checkpoints of Hugging Face folders and Megatron, into each other, in bounded memory.

A model family is a list of pieces (:mod:`.tensor_map`, :mod:`.families`): which box of which Megatron tensor
is which box of which Hugging Face tensor. Everything else reads that one list: conversion both ways
(:mod:`.stream`), comparison (:mod:`.verify`) and the translation of a live engine's shards (:mod:`.publish`).
"""
