"""Plain ``nn.Module`` classifiers: one file and one ``conf/model/*.yaml`` each. They know nothing of pruning."""
