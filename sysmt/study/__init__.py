"""Studies: many settings of one network, measured, stored and plotted."""
