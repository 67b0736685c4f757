source (path dirname (status filename))/flom.fish
