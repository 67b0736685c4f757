# flom.fish, beside this file, completes both.
source (string replace -r 'flomd\.fish$' flom.fish (status filename))
