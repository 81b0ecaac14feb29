"""Tasks for lm-eval that it lacks, or that it cannot load without a network (floor 2): YAML files and their functions.

`TaskManager(include_path=this folder)` finds the YAML files.
"""
