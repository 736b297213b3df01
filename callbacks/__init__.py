"""What happens around training; works with any module that offers the protocol a callback documents."""
