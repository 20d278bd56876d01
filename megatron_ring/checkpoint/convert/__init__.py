"""Convert checkpoints between Hugging Face folders and Megatron, in bounded memory.

A map (:mod:`.tensor_map`, made from a family's names by :mod:`.model_map`) says which box of which Megatron
tensor equals which box of which Hugging Face tensor. Everything else reads that one map: conversion both ways
(:mod:`.to_megatron`, :mod:`.to_hf`), comparison (:mod:`.verify`) and the translation of a live engine's shards
(:mod:`.publish`).
"""
