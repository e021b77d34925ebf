"""How far a student is from the teacher."""
