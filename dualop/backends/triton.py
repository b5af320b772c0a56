class Triton:
    name="triton"
    interpreted=False
    def environment(self): return ["soon"]
    def reasons(self,c,d): return ["soon"]
