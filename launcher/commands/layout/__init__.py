"""`motet layout show`: how a run is split over ranks."""
