"""What every format is made with: bounded reading, pieces of the disk, compressors, findings."""
