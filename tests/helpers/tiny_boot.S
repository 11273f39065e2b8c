/* A system of one sector, for tests of whole machines.
 *
 * Says "BOOT n" on the first serial line, where n counts in the disk's second sector how often it
 * has booted; then what the third sector holds. Gives back what is typed. Switches off when the
 * power button is pressed (q35: PM1a events at 0x600, control at 0x604).
 *
 * READS is how often it then reads 8 sectors, each time from the disk, and says "READ".
 */
        .ifndef READS
        .set READS, 0
        .endif
        .code16
        .globl _start
_start: cli
        xor %ax, %ax
        mov %ax, %ds
        mov %ax, %es
        mov %ax, %ss
        mov $0x7c00, %sp
        ljmp $0, $1f
1:      sti
        mov %dl, drive
        mov $0x42, %ah                  /* read sectors 1 and 2 to 0x8000 */
        mov $packet, %si
        int $0x13
        jc failed
        incb 0x8000
        movw $1, count
        mov $0x4300, %ax                /* write sector 1 */
        mov drive, %dl
        mov $packet, %si
        int $0x13
        jc failed
        mov $hello, %si
        call say
        mov 0x8000, %al
        add $'0', %al
        call put
        mov $space, %si
        call say
        mov $0x8200, %si
        call say
        mov $line, %si
        call say
        .if READS
        movw $8, count
        mov $READS, %bp
6:      mov $0x42, %ah
        mov drive, %dl
        mov $packet, %si
        int $0x13
        jc failed
        dec %bp
        jnz 6b
        mov $done, %si
        call say
        .endif
        mov $0x602, %dx                 /* power button enabled */
        mov $0x0100, %ax
        out %ax, %dx
wait:   mov $0x3fd, %dx
        in %dx, %al
        test $1, %al
        jz 2f
        mov $0x3f8, %dx
        in %dx, %al
        call put
2:      mov $0x600, %dx
        in %dx, %ax
        test $0x0100, %ax
        jz 3f
        mov $0x604, %dx
        mov $0x2000, %ax
        out %ax, %dx
3:      xor %cx, %cx                    /* 10 ms */
        mov $10000, %dx
        mov $0x86, %ah
        int $0x15
        jmp wait
failed: mov $broken, %si
        call say
        hlt
        jmp failed
say:    lodsb
        test %al, %al
        jz 4f
        call put
        jmp say
put:    push %dx
        push %ax
        mov $0x3fd, %dx
5:      in %dx, %al
        test $0x20, %al
        jz 5b
        pop %ax
        mov $0x3f8, %dx
        out %al, %dx
        pop %dx
4:      ret
drive:  .byte 0
hello:  .asciz "BOOT "
space:  .asciz " "
line:   .asciz "\r\n"
broken: .asciz "DISK FAILED\r\n"
done:   .asciz "READ\r\n"
        .balign 4
packet: .byte 16, 0
count:  .word 2
        .word 0x8000, 0
        .quad 1
        .org 510
        .word 0xaa55
