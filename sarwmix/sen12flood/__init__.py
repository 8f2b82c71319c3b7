"""SEN12-FLOOD: from the downloaded zip to pairs of Sentinel-1 images, and the data set that reads them.

| module | what |
|---|---|
| ``metadata`` | S1list.json, split lists, and the rule that makes pairs |
| ``grid`` | the Sentinel-2 pixel grid of a sequence |
| ``align`` | reading, checking and warping the Sentinel-1 tiles of one sequence |
| ``archive`` | inventory, safety checks and extraction of the zip |
| ``workspace`` | ownership, locks and removal of the folders that the preparation creates |
| ``layout`` | names and formats of the files in a prepared folder |
| ``prepare`` | the stages UNZIP, ALIGN, PAIR, CLEAN, WRITE and the command |
| ``dataset`` | the data set of pairs, from ``.npy`` files or from the store |
| ``demo`` | generator of a small raw tree of the same structure |
| ``baseline`` | the straightforward implementation that tests and benchmark compare with |
"""
