"""The room in virtual time: models, devices and requests, with every decision carried out and checked."""
