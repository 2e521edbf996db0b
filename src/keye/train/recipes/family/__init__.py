"""The recipe of the family: any checkpoint of Preview, 1.5, 2.0 or a text model, trained on data from files."""
