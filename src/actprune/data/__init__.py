"""Datasets as Lightning DataModules: one file and one ``conf/data/*.yaml`` each."""
